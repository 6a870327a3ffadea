//! The Kusto destination: what its keys mean, and what their values must satisfy.
//!
//! `raw.rs` has the keys' shapes; `validate.rs` calls this file where `destination.type` is `"kusto"`.
//! Which hosts an endpoint may have is decided by [`crate::uplink::kusto::trusted`], before anything is sent.
//! A secret is named here, never held: it is read when it is needed.

use std::path::{Path, PathBuf};

use reqwest::Url;
use toml::Spanned;

use super::raw::{
    Key, RawClientCertificate, RawClientSecret, RawDestination, RawIdentity, RawManagedIdentity,
    RawSecret, RawWorkloadIdentity, TableOf,
};
use super::validate::Check;
use crate::limits::{IDENTITY_ID_SIZE_MAX, TRUSTED_HOST_COUNT_MAX};
use crate::secret::SecretSource;
use crate::uplink::kusto::trusted::{TrustedHosts, is_loopback};

/// Azure Data Explorer as the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KustoConfig {
    /// The data management endpoint, without path and query. Its host is trusted.
    pub ingest_uri: Url,
    pub identity: Identity,
    pub mode: Mode,
    /// Hosts trusted beside the known ones: whole names, or suffixes that begin with a dot.
    pub trusted_hosts: Vec<String>,
}

/// How blobs are ingested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Blob, then queue message; the service batches.
    Queued,
}

/// Who weir is to Microsoft Entra.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    /// Of the machine; user-assigned where there is a client id.
    Managed { client_id: Option<String> },
    /// Of a Kubernetes service account; what is absent comes from the variables that its webhook sets.
    Workload {
        tenant: Option<String>,
        client_id: Option<String>,
        token_file: Option<PathBuf>,
    },
    ClientSecret {
        tenant: String,
        client_id: String,
        secret: SecretSource,
    },
    ClientCertificate {
        tenant: String,
        client_id: String,
        /// PEM with the certificate and its RSA key.
        certificate: SecretSource,
    },
    /// Whoever is logged in to `az`.
    AzureCli,
}

/// An endpoint for messages: what a URI looks like.
const URI_EXAMPLE: &str = "\"https://ingest-mycluster.westeurope.kusto.windows.net\"";

impl Check {
    /// The destination of type `"kusto"`; nothing where an error was noted.
    pub(super) fn kusto(&mut self, raw: RawDestination, base_dir: &Path) -> Option<KustoConfig> {
        let kind_span = raw.kind.as_ref().map_or(0..0, Spanned::span);
        let mode = self.choice(raw.mode, &[("queued", Mode::Queued)], Mode::Queued);
        let trusted_hosts = self.trusted_hosts(raw.trusted_hosts);
        if raw.ingest_uri.is_none() {
            let message = format!("type \"kusto\" needs `ingest_uri`, such as {URI_EXAMPLE}");
            self.error(kind_span.clone(), message);
        }
        let ingest_uri = raw
            .ingest_uri
            .and_then(|uri| self.ingest_uri(&uri, &trusted_hosts));
        if raw.identity.is_none() {
            let message = "type \"kusto\" needs `identity`, such as { managed_identity = \
                           \"system\" }, or { azure_cli = {} } for a first try";
            self.error(kind_span, message);
        }
        let identity = raw
            .identity
            .and_then(|identity| self.identity(identity, base_dir));
        Some(KustoConfig {
            ingest_uri: ingest_uri?,
            identity: identity?,
            mode,
            trusted_hosts,
        })
    }

    /// Keys that only `"kusto"` reads must not be set and ignored.
    pub(super) fn no_kusto(&mut self, raw: &RawDestination) {
        let spans = [
            ("ingest_uri", raw.ingest_uri.as_ref().map(Spanned::span)),
            ("identity", raw.identity.as_ref().map(Spanned::span)),
            ("mode", raw.mode.as_ref().map(Spanned::span)),
            (
                "trusted_hosts",
                raw.trusted_hosts.as_ref().map(Spanned::span),
            ),
        ];
        for (key, span) in spans {
            if let Some(span) = span {
                let message =
                    format!("`{key}` is for type \"kusto\"; set the type, or remove the key");
                self.error(span, message);
            }
        }
    }

    fn ingest_uri(&mut self, uri: &Spanned<String>, trusted_hosts: &[String]) -> Option<Url> {
        let checked = ingest_uri_parse(uri.get_ref(), trusted_hosts);
        checked
            .map_err(|message| self.error(uri.span(), message))
            .ok()
    }

    fn trusted_hosts(&mut self, key: Key<Vec<Spanned<String>>>) -> Vec<String> {
        let Some(hosts) = key else { return Vec::new() };
        if hosts.get_ref().len() > TRUSTED_HOST_COUNT_MAX {
            let message = format!(
                "{} hosts; use {TRUSTED_HOST_COUNT_MAX} at most, a suffix such as \".example.com\" \
                 stands for many",
                hosts.get_ref().len()
            );
            self.error(hosts.span(), message);
        }
        let is_label = |label: &str| {
            let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
            !label.is_empty() && label.bytes().all(is_allowed)
        };
        for host in hosts.get_ref() {
            let text = host.get_ref();
            let name = text.strip_prefix('.').unwrap_or(text);
            // A suffix of one label would trust everybody below a top-level domain.
            let is_suffix_too_wide = text.starts_with('.') && !name.contains('.');
            if !name.split('.').all(is_label) || is_suffix_too_wide {
                let message = format!(
                    "\"{text}\" is not a host's name; write \"kusto.example.com\", or \
                     \".example.com\" for all below it, without scheme and port"
                );
                self.error(host.span(), message);
            }
        }
        let hosts = hosts.into_inner().into_iter();
        hosts.map(Spanned::into_inner).collect()
    }

    fn identity(
        &mut self,
        raw: Spanned<TableOf<RawIdentity>>,
        base_dir: &Path,
    ) -> Option<Identity> {
        let span = raw.span();
        let TableOf(raw) = raw.into_inner();
        let mut identities = Vec::new();
        if let Some(managed) = raw.managed_identity {
            identities.push(self.managed_identity(managed));
        }
        if let Some(workload) = raw.workload_identity {
            identities.push(self.workload_identity(workload.into_inner().0, base_dir));
        }
        if let Some(secret) = raw.client_secret {
            identities.push(self.client_secret(secret, base_dir));
        }
        if let Some(certificate) = raw.client_certificate {
            identities.push(self.client_certificate(certificate, base_dir));
        }
        if raw.azure_cli.is_some() {
            identities.push(Some(Identity::AzureCli));
        }
        if identities.len() != 1 {
            let message = format!(
                "{} identities; use exactly one of `managed_identity`, `workload_identity`, \
                 `client_secret`, `client_certificate` and `azure_cli`",
                identities.len()
            );
            self.error(span, message);
        }
        identities.into_iter().next().flatten()
    }

    fn managed_identity(&mut self, raw: Spanned<RawManagedIdentity>) -> Option<Identity> {
        let span = raw.span();
        match raw.into_inner() {
            RawManagedIdentity::Word(word) if word == "system" => {
                Some(Identity::Managed { client_id: None })
            }
            RawManagedIdentity::Word(word) => {
                let message = format!(
                    "unknown value `{word}`; use \"system\", or {{ client_id = \"…\" }} for a \
                     user-assigned identity"
                );
                self.error(span, message);
                None
            }
            RawManagedIdentity::User(TableOf(user)) => {
                let client_id = self.id(Spanned::new(span, user.client_id), "client_id");
                Some(Identity::Managed {
                    client_id: Some(client_id?),
                })
            }
        }
    }

    fn workload_identity(&mut self, raw: RawWorkloadIdentity, base_dir: &Path) -> Option<Identity> {
        let mut is_valid = true;
        let mut id = |check: &mut Self, key: Key<String>, name| {
            let value = key.map(|value| check.id(value, name));
            is_valid &= !matches!(value, Some(None));
            value.flatten()
        };
        let tenant = id(self, raw.tenant, "tenant");
        let client_id = id(self, raw.client_id, "client_id");
        let token_file = raw.token_file.and_then(|path| self.file(path, base_dir));
        is_valid.then_some(Identity::Workload {
            tenant,
            client_id,
            token_file,
        })
    }

    fn client_secret(
        &mut self,
        raw: Spanned<TableOf<RawClientSecret>>,
        base_dir: &Path,
    ) -> Option<Identity> {
        let span = raw.span();
        let TableOf(raw) = raw.into_inner();
        let (Some(tenant), Some(client_id), Some(secret)) = (raw.tenant, raw.client_id, raw.secret)
        else {
            let message = "a client secret has `tenant`, `client_id` and `secret`; add the missing";
            self.error(span, message);
            return None;
        };
        let secret = self.secret_source(secret, base_dir);
        Some(Identity::ClientSecret {
            tenant: self.id(tenant, "tenant")?,
            client_id: self.id(client_id, "client_id")?,
            secret: secret?,
        })
    }

    fn client_certificate(
        &mut self,
        raw: Spanned<TableOf<RawClientCertificate>>,
        base_dir: &Path,
    ) -> Option<Identity> {
        let span = raw.span();
        let TableOf(raw) = raw.into_inner();
        let (Some(tenant), Some(client_id), Some(certificate)) =
            (raw.tenant, raw.client_id, raw.certificate)
        else {
            let message = "a client certificate has `tenant`, `client_id` and `certificate`; add \
                           the missing";
            self.error(span, message);
            return None;
        };
        let certificate = self.secret_source(certificate, base_dir);
        Some(Identity::ClientCertificate {
            tenant: self.id(tenant, "tenant")?,
            client_id: self.id(client_id, "client_id")?,
            certificate: certificate?,
        })
    }

    /// An id or a domain: it becomes a part of a URL and of a form.
    fn id(&mut self, value: Spanned<String>, name: &str) -> Option<String> {
        let text = value.get_ref();
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-.".contains(&byte);
        if text.is_empty() || text.len() > IDENTITY_ID_SIZE_MAX || !text.bytes().all(is_allowed) {
            let message = format!(
                "`{name}` has 1 to {IDENTITY_ID_SIZE_MAX} letters, digits, `-` and `.`, such as \
                 \"11111111-2222-3333-4444-555555555555\""
            );
            self.error(value.span(), message);
            return None;
        }
        Some(value.into_inner())
    }

    fn secret_source(&mut self, raw: Spanned<RawSecret>, base_dir: &Path) -> Option<SecretSource> {
        let span = raw.span();
        match raw.into_inner() {
            RawSecret::Env(TableOf(source)) => {
                let name = source.env;
                if name.is_empty() || name.contains(['=', '\0']) {
                    self.error(
                        span,
                        "not the name of an environment variable; change `env`",
                    );
                    return None;
                }
                Some(SecretSource::Env(name))
            }
            RawSecret::File(TableOf(source)) => self
                .file(Spanned::new(span, source.file), base_dir)
                .map(SecretSource::File),
        }
    }

    pub(super) fn file(&mut self, path: Spanned<String>, base_dir: &Path) -> Option<PathBuf> {
        if path.get_ref().is_empty() || path.get_ref().contains('\0') {
            self.error(path.span(), "not a path; name a file");
            return None;
        }
        Some(base_dir.join(path.into_inner()))
    }
}

/// Reads an endpoint: scheme, host and port, whose host is a cluster's ingestion host or trusted by name.
fn ingest_uri_parse(text: &str, trusted_hosts: &[String]) -> Result<Url, String> {
    let url = Url::parse(text)
        .map_err(|error| format!("not a URL ({error}); write it such as {URI_EXAMPLE}"))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err("a URI with a user in it; remove it, `identity` says who weir is".into());
    }
    if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
        return Err(format!(
            "the endpoint alone is meant, without path and query, such as {URI_EXAMPLE}"
        ));
    }
    TrustedHosts::of(&url, trusted_hosts).map_err(|untrusted| untrusted.to_string())?;
    let host = url.host_str().unwrap_or_default();
    let is_own = |known: &String| host.eq_ignore_ascii_case(known) || known.starts_with('.');
    if !host.starts_with("ingest-") && !is_loopback(host) && !trusted_hosts.iter().any(is_own) {
        return Err(format!(
            "{host} is a cluster's query endpoint; ingestion has its own, did you mean \
             \"https://ingest-{host}\"?"
        ));
    }
    Ok(url)
}
