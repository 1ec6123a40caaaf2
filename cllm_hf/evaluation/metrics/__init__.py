"""Whether answers are right, and how fast they were made: GSM8K, Spider and decoding speed."""
