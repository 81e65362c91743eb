"""Operations that the model calls through one function each, whatever computes them."""
