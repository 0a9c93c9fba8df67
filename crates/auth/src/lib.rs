//! From an image reference to an Authorization header: keychains, chain, challenges, token cache.
