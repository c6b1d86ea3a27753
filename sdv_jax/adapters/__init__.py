"""What turns a text-to-video model into a subject-driven one: low-rank adapters, and reference images as tokens."""
