//! Shared access signatures: made, and checked, as Azure Storage does.
//!
//! Before it: an account's key. After it: the query of every URL that the stand-in hands out, for its own storage or for Azurite.
//! Thread: any. Allocates: freely.
//! Invariant: a signature made here is accepted here, and by Azurite.
//! Not here: which signatures were withdrawn ([`super::storage`]).
//!
//! Source: Azure Storage REST, "Create a service SAS" and "Create an account SAS", version 2020-12-06 and later.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use jiff::Timestamp;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use sha2::Sha256;

use super::clock::seconds_text;

/// The signing version, `sv`. Azurite 3.35 knows it.
pub(super) const VERSION: &str = "2023-11-03";

/// Bytes of a signature as base64.
const SIGNATURE_SIZE: usize = 44;

/// What a query value may hold unescaped (RFC 3986 §2.3).
const QUERY: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// Percent-encodes one value of a query.
pub(super) fn encode(value: &str) -> String {
    utf8_percent_encode(value, QUERY).to_string()
}

/// A storage account's name and key.
#[derive(Clone)]
pub(super) struct AccountKey {
    pub account: String,
    pub key: Vec<u8>,
}

/// What a service SAS grants on one container or queue.
pub(super) struct Grant<'a> {
    pub service: StorageService,
    pub resource: &'a str,
    /// Letters in Azure's order: `racwd` for blobs, `raup` for queues.
    pub permissions: &'a str,
    pub starts: Timestamp,
    pub ends: Timestamp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StorageService {
    Blob,
    Queue,
}

/// A signed query, without `?`.
pub(super) struct Signed {
    pub query: String,
    /// The signature as base64, before percent-encoding.
    pub signature: String,
}

impl AccountKey {
    fn sign(&self, text: &str) -> String {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key).expect("HMAC takes any key");
        mac.update(text.as_bytes());
        STANDARD.encode(mac.finalize().into_bytes())
    }

    /// A service SAS, at least `size` bytes long.
    ///
    /// What is missing is filled: for blobs with a signed parameter that every client passes on, for queues with one that no
    /// service knows, since theirs have none to fill.
    pub fn service_sas(&self, grant: &Grant<'_>, size: usize) -> Signed {
        let (starts, ends) = (seconds_text(grant.starts), seconds_text(grant.ends));
        let (resource_type, filler_name) = match grant.service {
            StorageService::Blob => ("&sr=c", "rscd"),
            StorageService::Queue => ("", "filler"),
        };
        let mut query = format!(
            "sv={VERSION}&st={}&se={}{resource_type}&sp={}",
            encode(&starts),
            encode(&ends),
            grant.permissions
        );
        let size_without = query.len() + "&sig=".len() + SIGNATURE_SIZE;
        let filler = "f".repeat(size.saturating_sub(size_without));
        let text = self.string_to_sign(grant.service, grant.resource, &|name| match name {
            "sp" => grant.permissions.into(),
            "st" => starts.clone(),
            "se" => ends.clone(),
            "sv" => VERSION.into(),
            "sr" => "c".into(),
            "rscd" => filler.clone(),
            _ => String::new(),
        });
        let signature = self.sign(&text);
        if !filler.is_empty() {
            query += &format!("&{filler_name}={filler}");
        }
        query += &format!("&sig={}", encode(&signature));
        Signed { query, signature }
    }

    /// An account SAS for everything that an engine does to blobs and queues.
    pub fn account_sas(&self, starts: Timestamp, ends: Timestamp) -> String {
        let (starts, ends) = (seconds_text(starts), seconds_text(ends));
        let (permissions, services, kinds) = ("rwdlacup", "bq", "sco");
        let text = format!(
            "{}\n{permissions}\n{services}\n{kinds}\n{starts}\n{ends}\n\n\n{VERSION}\n\n",
            self.account
        );
        format!(
            "sv={VERSION}&ss={services}&srt={kinds}&sp={permissions}&st={}&se={}&sig={}",
            encode(&starts),
            encode(&ends),
            encode(&self.sign(&text))
        )
    }

    /// Whether `signature` is this account's over the service SAS whose values `value` gives.
    pub fn verifies(
        &self,
        service: StorageService,
        resource: &str,
        value: &dyn Fn(&str) -> String,
        signature: &str,
    ) -> bool {
        let text = self.string_to_sign(service, resource, value);
        self.sign(&text) == signature
    }

    fn string_to_sign(
        &self,
        service: StorageService,
        resource: &str,
        value: &dyn Fn(&str) -> String,
    ) -> String {
        let service_name = match service {
            StorageService::Blob => "blob",
            StorageService::Queue => "queue",
        };
        let mut fields = vec![value("sp"), value("st"), value("se")];
        fields.push(format!("/{service_name}/{}/{resource}", self.account));
        fields.extend(["si", "sip", "spr", "sv"].map(value));
        if service == StorageService::Blob {
            let more = [
                "sr", "snapshot", "ses", "rscc", "rscd", "rsce", "rscl", "rsct",
            ];
            fields.extend(more.map(value));
        }
        fields.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> AccountKey {
        AccountKey {
            account: "account0".into(),
            key: b"a key".to_vec(),
        }
    }

    fn signed(service: StorageService, size: usize) -> Signed {
        let grant = Grant {
            service,
            resource: "c",
            permissions: "rw",
            starts: "2026-11-23T09:00:00Z".parse().unwrap(),
            ends: "2026-11-23T10:00:00Z".parse().unwrap(),
        };
        key().service_sas(&grant, size)
    }

    fn verifies(signed: &Signed, service: StorageService, resource: &str) -> bool {
        let values: std::collections::HashMap<String, String> =
            url::form_urlencoded::parse(signed.query.as_bytes())
                .into_owned()
                .collect();
        let value = |name: &str| values.get(name).cloned().unwrap_or_default();
        key().verifies(service, resource, &value, &value("sig"))
    }

    #[test]
    fn a_signature_holds_for_its_resource_only() {
        for service in [StorageService::Blob, StorageService::Queue] {
            let signed = signed(service, 0);
            assert!(verifies(&signed, service, "c"));
            assert!(!verifies(&signed, service, "d"));
        }
    }

    #[test]
    fn another_permission_breaks_it() {
        let mut signed = signed(StorageService::Blob, 0);
        signed.query = signed.query.replace("sp=rw", "sp=rwd");
        assert!(!verifies(&signed, StorageService::Blob, "c"));
    }

    #[test]
    fn is_as_long_as_asked() {
        for service in [StorageService::Blob, StorageService::Queue] {
            let signed = signed(service, 700);
            assert!((700..800).contains(&signed.query.len()));
            assert!(verifies(&signed, service, "c"));
        }
    }
}
