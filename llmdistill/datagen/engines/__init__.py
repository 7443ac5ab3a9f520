"""What answers calls: an OpenAI-compatible endpoint, the service, vLLM or transformers in this process."""
