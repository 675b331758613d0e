"""How a weight is stored in fewer bits: int8 and int4."""
