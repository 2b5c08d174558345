"""The embedded data: pictures of characters, drawn from fonts."""
