//! weir takes events over HTTP and delivers them as gzip blobs, on memory that does not move.

pub mod limits;

pub mod error;

pub mod config;

pub mod records;
