"""What the experts of a model do: routing statistics, figures, the HTML report."""
