"""Where samples come from: vLLM or transformers in this process, an OpenAI endpoint, our own service."""
