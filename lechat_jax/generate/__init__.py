"""Text generation: prefill, decode loop, continuous batching, sampling, prompt lookup decoding."""
