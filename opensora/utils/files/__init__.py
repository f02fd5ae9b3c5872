"""Files of users and strangers: read with care, written whole or not at all."""
