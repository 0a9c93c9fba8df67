//! The Kubernetes secrets keychain: kubeconfig, list, watch, matching.
