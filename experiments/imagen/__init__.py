"""Train, draw with and evaluate the Imagen cascade."""
