//! Local content: the soci store, containerd's content, image and lease services.
