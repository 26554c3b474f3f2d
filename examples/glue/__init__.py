"""Fine-tuning of a pretrained Llama on sentence tasks, including GLUE."""
