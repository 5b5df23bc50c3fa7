"""A bundle's stages at work, and a picture's way through them."""
