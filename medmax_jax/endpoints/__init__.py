"""Model servers: the client, its cache, and the guard of data that may leave.

cached_chat_api  Many calls of an endpoint: some at once, each reply on the disk before it is used,
                 none twice.
chat_api         One call of an OpenAI-compatible endpoint: POST URL/chat/completions, by the
                 standard library.
egress           Where data may go: the one guard that every outgoing call passes before its first
                 byte.
reasoning        Separates the answer of a reasoning model from the reasoning text that some
                 servers leave in it.
"""
