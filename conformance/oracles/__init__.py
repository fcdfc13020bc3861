"""What decides: the truth that candidates are measured against (TrueDouble, Hugging Face, torch.nn, equations)."""
