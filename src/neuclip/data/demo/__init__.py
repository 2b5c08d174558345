"""The demo data: images of characters with their Unicode names.

- `fonts`: finds font faces and draws their characters;
- `build`: splits the characters, words the captions, writes the shards.
"""
