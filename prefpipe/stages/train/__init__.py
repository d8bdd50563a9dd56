"""Training: which pairs go into a step, what they cost, and how the policy moves."""
