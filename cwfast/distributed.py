"""The answers of one process, from scores that are spread over ranks."""
