//! Coming in as kube-apiserver does.

pub mod connect;
