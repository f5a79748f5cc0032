"""The gRPC services, and the frontend as an actor that serves them."""
