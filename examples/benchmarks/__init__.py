"""What examples/benchmark.py is made of, and two measurements of their own: training_step.py and previews.py."""
