"""The CogVideoX family."""
