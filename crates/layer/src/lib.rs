//! One layer's bytes: any verified range of it, or its whole tar stream; the span cache.
