"""One model family a file; import the family that you need, such as `reference_impl.models.llama`."""
