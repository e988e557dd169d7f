"""Model servers: the client, its cache, and the check of where data may be sent.

cached_chat_api  Concurrent calls of an endpoint: each reply is on the disk before it is used, and
                 no call is repeated.
chat_api         One call of an OpenAI-compatible endpoint: POST URL/chat/completions, with the
                 standard library.
egress           Where data may be sent: the one check that every outgoing call passes before its
                 first byte.
reasoning        Separate the answer of a reasoning model from the reasoning text that some servers
                 leave in it.
"""
