//! The distribution protocol over an ordered list of hosts: manifests, referrers, ranged blobs, push.
