"""What is done with trained weights: measured, drawn, written, exported."""
