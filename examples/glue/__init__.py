"""Fine-tuning of a pretrained Llama on sentence tasks, those of GLUE among them."""
