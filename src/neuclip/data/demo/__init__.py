"""The demo data: images of characters with their Unicode names.

- `fonts`: finds font faces and draws their characters;
- `splits`: divides the characters into splits and words the captions;
- `build`: writes the shards.
"""
