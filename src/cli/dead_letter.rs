//! `weir dead-letter`: what the destination did not take, for people: list, look, deliver again, drop.
//!
//! Looking only reads, also beside a running weir. What changes something takes the directory, which a running weir has.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::Arc;

use bytes::Bytes;
use zlib_rs::{Inflate, InflateFlush, Status};

use super::spool::inflate_to;
use super::{ConfigArgs, DeadLetterCommand, Letters, print};
use crate::config::{Config, Destination, Size, Table};
use crate::error::{Fatal, Remedy, UploadError};
use crate::limits::{DELIVERY_PAUSE_MAX, DELIVERY_PAUSE_MIN};
use crate::spool::frame::Totals;
use crate::spool::segment::BatchId;
use crate::uplink::courier::meta;
use crate::uplink::dead_letter::{DeadLetters, Reason};
use crate::uplink::directory::Directory;
use crate::uplink::kusto::Kusto;
use crate::upload_buffer::Batch;
