//! Blobs: Put Blob, Put Block, Put Block List, Get Blob, Get Blob Properties.
//!
//! Before it: [`super::Place`] has admitted the request. After it: [`crate::standin::engine`] reads the blob.
//! Thread: the runtime's. Allocates: the blobs, up to a bound beyond which it answers `ServerBusy`.
//! Invariant: a blob that was not ingested yet is never dropped; ingested ones go, oldest first, when room is needed.
//! Not here: ranges, snapshots, leases, `Content-MD5`, every other kind of blob.
//!
//! Source: Azure Storage REST, "Put Blob", "Put Block", "Put Block List", "Status and error codes".

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Mutex;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use jiff::Timestamp;
use serde::Deserialize;

use super::{Place, Query, StorageError, base64};
use crate::standin::clock::http_text;
use crate::standin::sas::StorageService;

/// Blocks of one blob; Azure's limit.
const BLOCK_COUNT_MAX: usize = 50_000;
/// Bytes of a block's id, decoded.
const BLOCK_ID_SIZE_MAX: usize = 64;

/// The largest blob that is taken; far above what weir makes, below what would hurt the machine.
const BLOB_SIZE_MAX: usize = 512 << 20;

/// Where a blob is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(in crate::standin) struct Key {
    pub account: usize,
    pub container: String,
    pub name: String,
}

#[derive(Default)]
struct Blob {
    committed: Option<Bytes>,
    committed_blocks: BTreeMap<String, Bytes>,
    uncommitted_blocks: BTreeMap<String, Bytes>,
    etag: u64,
    modified: Timestamp,
}

impl Blob {
    fn size(&self) -> usize {
        let blocks: usize = self.uncommitted_blocks.values().map(Bytes::len).sum();
        blocks + self.committed.as_ref().map_or(0, Bytes::len)
    }
}

/// All blobs of all accounts.
pub(in crate::standin) struct Store {
    size_max: usize,
    state: Mutex<Blobs>,
}

#[derive(Default)]
struct Blobs {
    blobs: HashMap<Key, Blob>,
    size: usize,
    etag: u64,
    /// Ingested, oldest first. May name blobs that are gone.
    evictable: VecDeque<Key>,
}

impl Blobs {
    fn remove(&mut self, key: &Key) {
        if let Some(blob) = self.blobs.remove(key) {
            self.size -= blob.size();
        }
    }

    fn make_room(&mut self, size: usize, size_max: usize) -> Result<(), StorageError> {
        while self.size + size > size_max {
            let Some(key) = self.evictable.pop_front() else {
                let message = "The server is busy: the stand-in holds as many blobs as it may.";
                return Err(StorageError::new(503, "ServerBusy", message));
            };
            self.remove(&key);
        }
        Ok(())
    }

    /// Changes one blob, and keeps the sum of sizes.
    fn change<T>(
        &mut self,
        key: Key,
        now: Timestamp,
        change: impl FnOnce(&mut Blob) -> T,
    ) -> (T, u64) {
        self.etag += 1;
        let etag = self.etag;
        let blob = self.blobs.entry(key).or_default();
        let before = blob.size();
        let changed = change(blob);
        (blob.etag, blob.modified) = (etag, now);
        self.size = self.size - before + blob.size();
        (changed, etag)
    }
}

#[derive(Deserialize)]
struct BlockList {
    #[serde(rename = "$value", default)]
    blocks: Vec<Block>,
}

#[derive(Deserialize)]
enum Block {
    Latest(String),
    Uncommitted(String),
    Committed(String),
}

impl Store {
    pub fn new(size_max: usize) -> Store {
        Store {
            size_max,
            state: Mutex::default(),
        }
    }

    /// The content of a blob that was committed.
    pub fn read(&self, key: &Key) -> Option<Bytes> {
        self.state.lock().unwrap().blobs.get(key)?.committed.clone()
    }

    pub fn delete(&self, key: &Key) {
        self.state.lock().unwrap().remove(key);
    }

    /// The blob may go when room is needed.
    pub fn release(&self, key: Key) {
        self.state.lock().unwrap().evictable.push_back(key);
    }

    pub fn count_and_size(&self) -> (usize, usize) {
        let state = self.state.lock().unwrap();
        (state.blobs.len(), state.size)
    }

    fn put(
        &self,
        key: Key,
        bytes: Bytes,
        create_only: bool,
        now: Timestamp,
    ) -> Result<u64, StorageError> {
        let mut state = self.state.lock().unwrap();
        check_absent(&state, &key, create_only)?;
        state.make_room(bytes.len(), self.size_max)?;
        let ((), etag) = state.change(key, now, |blob| {
            blob.committed = Some(bytes);
            // "Put Blob": uncommitted blocks are dropped.
            blob.uncommitted_blocks.clear();
            blob.committed_blocks.clear();
        });
        Ok(etag)
    }

    fn put_block(
        &self,
        key: Key,
        id: String,
        bytes: Bytes,
        now: Timestamp,
    ) -> Result<(), StorageError> {
        let mut state = self.state.lock().unwrap();
        if let Some(blob) = state.blobs.get(&key) {
            let mut ids = blob.uncommitted_blocks.keys();
            if ids.next().is_some_and(|other| other.len() != id.len()) {
                let message =
                    "The specified blob or block content is invalid: block ids differ in length.";
                return Err(StorageError::new(400, "InvalidBlobOrBlock", message));
            }
            if blob.uncommitted_blocks.len() >= 2 * BLOCK_COUNT_MAX {
                let message = "The uncommitted block count cannot exceed the maximum limit of 100,000 blocks.";
                return Err(StorageError::new(409, "BlockCountExceedsLimit", message));
            }
        }
        state.make_room(bytes.len(), self.size_max)?;
        state.change(key, now, |blob| blob.uncommitted_blocks.insert(id, bytes));
        Ok(())
    }

    fn commit(
        &self,
        key: Key,
        list: &BlockList,
        create_only: bool,
        now: Timestamp,
    ) -> Result<u64, StorageError> {
        let mut state = self.state.lock().unwrap();
        check_absent(&state, &key, create_only)?;
        let blob = state.blobs.get(&key);
        let uncommitted = |id: &String| blob?.uncommitted_blocks.get(id).cloned();
        let committed = |id: &String| blob?.committed_blocks.get(id).cloned();
        let mut blocks = BTreeMap::new();
        let mut bytes = Vec::new();
        for block in &list.blocks {
            let (id, content) = match block {
                Block::Latest(id) => (id, uncommitted(id).or_else(|| committed(id))),
                Block::Uncommitted(id) => (id, uncommitted(id)),
                Block::Committed(id) => (id, committed(id)),
            };
            let content = content.ok_or_else(|| {
                StorageError::new(
                    400,
                    "InvalidBlockList",
                    "The specified block list is invalid.",
                )
            })?;
            bytes.extend_from_slice(&content);
            blocks.insert(id.clone(), content);
        }
        let ((), etag) = state.change(key, now, |blob| {
            blob.committed = Some(bytes.into());
            blob.committed_blocks = blocks;
            blob.uncommitted_blocks.clear();
        });
        Ok(etag)
    }
}

fn check_absent(state: &Blobs, key: &Key, create_only: bool) -> Result<(), StorageError> {
    let exists = state
        .blobs
        .get(key)
        .is_some_and(|blob| blob.committed.is_some());
    if create_only && exists {
        let message = "The specified blob already exists.";
        return Err(StorageError::new(409, "BlobAlreadyExists", message));
    }
    Ok(())
}

/// What answers on an account's blob port.
pub(in crate::standin) fn router(place: Place) -> Router {
    Router::new()
        .route("/{account}/{container}/{*blob}", get(read).put(write))
        .fallback(super::unknown)
        .with_state(place)
}

type BlobPath = Path<(String, String, String)>;

async fn read(
    State(place): State<Place>,
    Path((account_name, container, name)): BlobPath,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, StorageError> {
    let query = Query::of(&uri);
    place.admit(
        &account_name,
        StorageService::Blob,
        &container,
        "r",
        &query,
        &headers,
    )?;
    let key = Key {
        account: place.account,
        container,
        name,
    };
    let state = place.service.storage.blobs.state.lock().unwrap();
    let blob = state.blobs.get(&key);
    let Some((blob, content)) = blob.and_then(|blob| Some((blob, blob.committed.clone()?))) else {
        return Err(StorageError::new(
            404,
            "BlobNotFound",
            "The specified blob does not exist.",
        ));
    };
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::ETAG, etag_text(blob.etag)),
        (header::LAST_MODIFIED, http_text(blob.modified)),
    ];
    Ok((headers, [("x-ms-blob-type", "BlockBlob")], content).into_response())
}

async fn write(
    State(place): State<Place>,
    Path((account_name, container, name)): BlobPath,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, StorageError> {
    let query = Query::of(&uri);
    place.admit(
        &account_name,
        StorageService::Blob,
        &container,
        "cw",
        &query,
        &headers,
    )?;
    let standin = &place.service;
    if name.chars().count() > 1024 {
        let message = "The specified resource name length is not within the permissible limits.";
        return Err(StorageError::new(400, "OutOfRangeInput", message));
    }
    for encoding in [
        header::CONTENT_ENCODING.as_str(),
        "x-ms-blob-content-encoding",
    ] {
        if headers.contains_key(encoding) {
            standin.journal.violation(format!(
                "a blob has {encoding}: a reader that honours it inflates once, and Kusto again for .gz"
            ));
        }
    }
    if !headers.contains_key(header::CONTENT_LENGTH) {
        let message = "You must provide the Content-Length HTTP header.";
        return Err(StorageError::new(
            411,
            "MissingContentLengthHeader",
            message,
        ));
    }
    let bytes = axum::body::to_bytes(body, BLOB_SIZE_MAX)
        .await
        .map_err(|_| {
            // Too large, or the client is gone and reads no answer.
            let message =
                "The request body is too large and exceeds the maximum permissible limit.";
            StorageError::new(413, "RequestBodyTooLarge", message)
        })?;
    let create_only = headers
        .get(header::IF_NONE_MATCH)
        .is_some_and(|value| value.as_bytes() == b"*");
    let key = Key {
        account: place.account,
        container,
        name,
    };
    let now = standin.clock.now();
    let blobs = &standin.storage.blobs;
    let etag = match query.get("comp") {
        None => {
            let kind = headers.get("x-ms-blob-type").map(|kind| kind.as_bytes());
            if kind != Some(b"BlockBlob") {
                let message = "An HTTP header that's mandatory for this request is not specified: x-ms-blob-type \
                               (the stand-in knows BlockBlob only).";
                return Err(StorageError::new(400, "MissingRequiredHeader", message));
            }
            Some(blobs.put(key, bytes, create_only, now)?)
        }
        Some("block") => {
            let id = block_id(&query)?;
            blobs.put_block(key, id, bytes, now)?;
            None
        }
        Some("blocklist") => {
            let list = block_list(&bytes)?;
            Some(blobs.commit(key, &list, create_only, now)?)
        }
        Some(other) => {
            let message = format!("Value for one of the query parameters is invalid: comp={other}");
            return Err(StorageError::new(
                400,
                "InvalidQueryParameterValue",
                message,
            ));
        }
    };
    let mut response = StatusCode::CREATED.into_response();
    if let Some(etag) = etag {
        let values = [
            (header::ETAG, etag_text(etag)),
            (header::LAST_MODIFIED, http_text(now)),
        ];
        for (name, value) in values {
            let value = value.parse().expect("etags and dates are ASCII");
            response.headers_mut().insert(name, value);
        }
    }
    let encrypted = header::HeaderValue::from_static("true");
    let name = "x-ms-request-server-encrypted";
    response.headers_mut().insert(name, encrypted);
    Ok(response)
}

fn etag_text(etag: u64) -> String {
    format!("\"0x{etag:016X}\"")
}

fn block_id(query: &Query) -> Result<String, StorageError> {
    let id = query.get("blockid").unwrap_or_default();
    let size = base64(id).map_or(0, |id| id.len());
    if (1..=BLOCK_ID_SIZE_MAX).contains(&size) {
        return Ok(id.into());
    }
    let message =
        "Value for one of the query parameters is invalid: blockid is base64 of 1 to 64 bytes.";
    Err(StorageError::new(
        400,
        "InvalidQueryParameterValue",
        message,
    ))
}

fn block_list(bytes: &[u8]) -> Result<BlockList, StorageError> {
    let invalid = || {
        StorageError::new(
            400,
            "InvalidXmlDocument",
            "The specified XML is not syntactically valid.",
        )
    };
    let text = std::str::from_utf8(bytes).map_err(|_| invalid())?;
    let list: BlockList = quick_xml::de::from_str(text).map_err(|_| invalid())?;
    if list.blocks.len() > BLOCK_COUNT_MAX {
        let message = "The committed block count cannot exceed the maximum limit of 50,000 blocks.";
        return Err(StorageError::new(409, "BlockCountExceedsLimit", message));
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key {
            account: 0,
            container: "c".into(),
            name: name.into(),
        }
    }

    fn put(store: &Store, name: &str, size: usize) -> Result<u64, StorageError> {
        store.put(key(name), vec![0; size].into(), true, Timestamp::now())
    }

    #[test]
    fn only_what_was_ingested_makes_room() {
        let store = Store::new(100);
        put(&store, "a", 60).unwrap();
        assert_eq!(put(&store, "b", 60).unwrap_err().code, "ServerBusy");
        store.release(key("a"));
        put(&store, "b", 60).unwrap();
        assert!(store.read(&key("a")).is_none());
        assert_eq!(store.count_and_size(), (1, 60));
    }

    #[test]
    fn a_block_list_keeps_the_order_of_its_elements() {
        let list = block_list(b"<?xml version=\"1.0\"?><BlockList><Latest>Yg==</Latest><Uncommitted>YQ==</Uncommitted><Latest>Yg==</Latest></BlockList>").unwrap();
        let store = Store::new(100);
        let now = Timestamp::now();
        for (id, content) in [("YQ==", "a"), ("Yg==", "b")] {
            store
                .put_block(key("x"), id.into(), content.into(), now)
                .unwrap();
        }
        store.commit(key("x"), &list, true, now).unwrap();
        assert_eq!(store.read(&key("x")).unwrap(), "bab");
        assert_eq!(store.count_and_size(), (1, 3));
    }
}
