//! Decode, validate, build and encode zTOCs; map offsets to spans; resume deflate at a checkpoint.
