"""Other libraries' objects: adapters of Hugging Face's peft. Nothing here is imported unless it is used."""
