"""What the tools and the adapters tell one another: results, moments, chosen noise. Beside `core`; plain numpy."""
