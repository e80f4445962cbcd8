"""What the command runs: recipes, data, training, and one file for each question that is answered."""
