"""How far models lie apart: distances of their weights, and the loss between them."""
