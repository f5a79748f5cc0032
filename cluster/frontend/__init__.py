"""Requests, from admission to the last token: journals, dispatch, streams. Independent of gRPC and Ray."""
