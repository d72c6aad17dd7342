"""The description of the API, for programs (/openapi.json) and for people (/docs)."""

from .document import document, document_bytes
from .page import operations

__all__ = ["document", "document_bytes", "operations"]
