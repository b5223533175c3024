"""Drop-ins for other libraries, on their own terms: same call, same result."""
