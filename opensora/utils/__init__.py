"""Small shared pieces; imports nothing of ours."""
