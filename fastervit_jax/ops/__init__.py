"""Operations with more than one implementation behind one function."""
