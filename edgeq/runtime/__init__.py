"""llama-cpp-python from the inside: load, tokenize, logits, observation, ggml's own encoders.

``library`` loads and checks the shared libraries; ``model`` runs a file; ``observer`` sees the
inputs of its matrix products; ``encoders`` are ggml's quantizers; ``presets`` are llama.cpp's
file types and its own ``llama_model_quantize``. Nothing else in edgeq imports ``llama_cpp``.
"""
