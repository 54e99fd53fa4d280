"""Answering: sampling, the engine with its slots, JSONL batches and chat."""
