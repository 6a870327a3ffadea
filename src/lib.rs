//! weir takes events over HTTP and delivers them as gzip blobs, on memory that does not move.

pub mod limits;

pub mod error;

pub mod cli;

pub mod config;

pub mod budget;

pub mod route;

pub mod records;
