"""How stored bytes become two views: decode, draw, crop, colour."""
