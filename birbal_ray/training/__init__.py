"""Fine-tuning: packed samples, a wall-clock deadline, checkpoints that are whole or absent."""
