"""A family as a model repository of Triton Inference Server: one model per degree, in the server's own batching."""
