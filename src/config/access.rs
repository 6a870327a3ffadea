//! Who may send how much: the values of `[[principal]]`, and of the same keys of listeners and routes.
//!
//! A part of `validate.rs`, which has the errors and the single values.
//! Secrets are not read here: the file says where they are, and a node reads them when it starts.

use std::collections::HashSet;
use std::net::IpAddr;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use ipnet::IpNet;
use toml::Spanned;

use super::error::{list, nearest};
use super::raw::{
    CredentialTable, Key, RawBasic, RawCertificate, RawCredential, RawHmac, RawPrincipal, RawRate,
    TableOf,
};
use super::validate::Check;
use super::{Credential, Hmac, Principal, Rate, SignatureEncoding, Token};
use crate::limits::{
    HEADER_NAME_SIZE_MAX, NETWORK_COUNT_MAX, PRINCIPAL_COUNT_MAX, PRINCIPAL_NAME_SIZE_MAX,
    RATE_MAX, SECRET_COUNT_MAX, SUBJECT_COUNT_MAX,
};
use crate::secret::SecretSource;

impl Check {
    pub(super) fn principals(
        &mut self,
        raw: Key<Vec<Spanned<TableOf<RawPrincipal>>>>,
        base_dir: &Path,
    ) -> Vec<Principal> {
        let Some(raw) = raw else { return Vec::new() };
        if raw.get_ref().len() > PRINCIPAL_COUNT_MAX {
            let message = format!(
                "{} principals; configure {PRINCIPAL_COUNT_MAX} at most",
                raw.get_ref().len()
            );
            self.error(raw.span(), message);
            return Vec::new();
        }
        let mut principals = Vec::new();
        let mut seen = HashSet::new();
        let mut subjects = HashSet::new();
        for principal in raw.into_inner() {
            let span = principal.span();
            let TableOf(principal) = principal.into_inner();
            let name = self.principal_name(principal.name, span.clone(), &mut seen);
            let rate = self.rate(principal.rate);
            let RawPrincipal {
                bearer,
                basic,
                hmac,
                certificate,
                ..
            } = principal;
            let credential = match (bearer, basic, hmac, certificate) {
                (Some(tokens), None, None, None) => {
                    Some(Credential::Bearer(self.tokens(tokens, base_dir)))
                }
                (None, Some(basic), None, None) => self.basic(basic, base_dir),
                (None, None, Some(hmac), None) => self.hmac(hmac, base_dir),
                (None, None, None, Some(certificate)) => {
                    self.certificate(certificate, &mut subjects)
                }
                _ => {
                    let message =
                        "a principal has one of `bearer`, `basic`, `hmac` and `certificate`";
                    self.error(span, message);
                    None
                }
            };
            // Without a credential an error is noted, so nobody sees the list.
            if let Some(credential) = credential {
                principals.push(Principal {
                    name,
                    credential,
                    rate,
                });
            }
        }
        principals
    }

    fn principal_name(
        &mut self,
        key: Key<String>,
        span: Range<usize>,
        seen: &mut HashSet<String>,
    ) -> String {
        let Some(value) = key else {
            self.error(span, "a principal has a `name`; add it");
            return String::new();
        };
        let name = value.get_ref();
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if name.is_empty() || name.len() > PRINCIPAL_NAME_SIZE_MAX || !name.chars().all(is_allowed)
        {
            self.error(
                value.span(),
                format!(
                    "a name has 1 to {PRINCIPAL_NAME_SIZE_MAX} letters, digits, `_`, `-` and `.`; change it"
                ),
            );
        } else if !seen.insert(name.clone()) {
            self.error(value.span(), "another principal has this name; change one");
        }
        value.into_inner()
    }

    fn tokens(&mut self, raw: Spanned<Vec<Spanned<RawCredential>>>, base_dir: &Path) -> Vec<Token> {
        self.secret_count(raw.span(), raw.get_ref().len());
        let mut tokens = Vec::new();
        for secret in raw.into_inner() {
            let span = secret.span();
            let RawCredential(CredentialTable { env, file, sha256 }) = secret.into_inner();
            let token = match sha256 {
                Some(hash) if env.is_none() && file.is_none() => match hash_parse(hash.get_ref()) {
                    Some(hash) => Some(Token::Sha256(hash)),
                    None => {
                        let message = "not a SHA-256: write 64 hexadecimal digits, as of `printf %s TOKEN | sha256sum`";
                        self.error(hash.span(), message);
                        None
                    }
                },
                Some(_) => {
                    self.error(span, "a token has one of `env`, `file` and `sha256`");
                    None
                }
                None => self.source(span, env, file, base_dir).map(Token::Secret),
            };
            tokens.extend(token);
        }
        tokens
    }

    fn basic(&mut self, raw: Spanned<TableOf<RawBasic>>, base_dir: &Path) -> Option<Credential> {
        let span = raw.span();
        let TableOf(raw) = raw.into_inner();
        let (Some(user), Some(passwords)) = (raw.user, raw.passwords) else {
            self.error(
                span,
                "`basic` has a `user` and `passwords`; add what is missing",
            );
            return None;
        };
        // RFC 7617 §2: the first colon ends the user.
        if user.get_ref().is_empty() || user.get_ref().contains([':', '\0']) {
            self.error(
                user.span(),
                "a user is not empty and has no colon; change it",
            );
        }
        Some(Credential::Basic {
            user: user.into_inner(),
            passwords: self.sources(passwords, base_dir),
        })
    }

    fn hmac(&mut self, raw: Spanned<TableOf<RawHmac>>, base_dir: &Path) -> Option<Credential> {
        let span = raw.span();
        let TableOf(raw) = raw.into_inner();
        let Some(secrets) = raw.secrets else {
            self.error(span, "`hmac` has `secrets`; add them");
            return None;
        };
        let default = Hmac::default();
        let header = match raw.header {
            Some(header) => {
                let name = header.get_ref();
                let is_token = crate::http::syntax::is_token(name.as_bytes());
                if !is_token || name.len() > HEADER_NAME_SIZE_MAX {
                    self.error(header.span(), "not the name of a header field");
                }
                header.into_inner()
            }
            None => default.header,
        };
        Some(Credential::Hmac(Hmac {
            secrets: self.sources(secrets, base_dir),
            header,
            prefix: raw.prefix.map_or(default.prefix, Spanned::into_inner),
            encoding: self.choice(
                raw.encoding,
                &[
                    ("hex", SignatureEncoding::Hex),
                    ("base64", SignatureEncoding::Base64),
                ],
                default.encoding,
            ),
        }))
    }

    /// `seen` has the names of all principals before.
    fn certificate(
        &mut self,
        raw: Spanned<TableOf<RawCertificate>>,
        seen: &mut HashSet<String>,
    ) -> Option<Credential> {
        let span = raw.span();
        let Some(subjects) = raw.into_inner().0.subjects else {
            self.error(span, "`certificate` has `subjects`; add them");
            return None;
        };
        let count = subjects.get_ref().len();
        if count == 0 || count > SUBJECT_COUNT_MAX {
            let message = format!("{count} subjects; give 1 to {SUBJECT_COUNT_MAX}");
            self.error(subjects.span(), message);
        }
        let mut names = Vec::new();
        for subject in subjects.into_inner() {
            let name = subject.get_ref();
            let is_alternative = ["dns:", "uri:"].iter().any(|kind| {
                let rest = name.strip_prefix(kind);
                rest.is_some_and(|rest| !rest.is_empty())
            });
            if !is_alternative && !name.contains('=') {
                let message = format!(
                    "\"{name}\" is no name of a certificate; write its subject, such as \"CN=device-1,O=Example\" \
                     (openssl x509 -noout -subject -nameopt RFC2253), or \"dns:NAME\" or \"uri:URI\" for an alternative \
                     name"
                );
                self.error(subject.span(), message);
            } else if !seen.insert(name.clone()) {
                self.error(
                    subject.span(),
                    "a principal has this name already; remove one",
                );
            }
            names.push(subject.into_inner());
        }
        Some(Credential::Certificate(names))
    }

    fn sources(
        &mut self,
        raw: Spanned<Vec<Spanned<RawCredential>>>,
        base_dir: &Path,
    ) -> Vec<SecretSource> {
        self.secret_count(raw.span(), raw.get_ref().len());
        let mut sources = Vec::new();
        for secret in raw.into_inner() {
            let span = secret.span();
            let RawCredential(CredentialTable { env, file, sha256 }) = secret.into_inner();
            if sha256.is_some() {
                self.error(span, "only a bearer token can be given as its hash");
                continue;
            }
            sources.extend(self.source(span, env, file, base_dir));
        }
        sources
    }

    fn secret_count(&mut self, span: Range<usize>, count: usize) {
        if count == 0 || count > SECRET_COUNT_MAX {
            let message = format!("{count} secrets; give 1 to {SECRET_COUNT_MAX}");
            self.error(span, message);
        }
    }

    fn source(
        &mut self,
        span: Range<usize>,
        env: Key<String>,
        file: Key<String>,
        base_dir: &Path,
    ) -> Option<SecretSource> {
        match (env, file) {
            (Some(name), None)
                if !name.get_ref().is_empty() && !name.get_ref().contains(['=', '\0']) =>
            {
                Some(SecretSource::Env(name.into_inner()))
            }
            (None, Some(path)) if !path.get_ref().is_empty() && !path.get_ref().contains('\0') => {
                Some(SecretSource::File(base_dir.join(path.into_inner())))
            }
            _ => {
                let message = "a secret is `{ env = \"NAME\" }` or `{ file = \"path\" }`";
                self.error(span, message);
                None
            }
        }
    }

    /// The indexes of principals in the list that is named; `None` where anybody may send.
    pub(super) fn allowed_principals(
        &mut self,
        key: Key<Vec<Spanned<String>>>,
        principals: &[Principal],
    ) -> Option<Vec<usize>> {
        let names = key?;
        if names.get_ref().is_empty() {
            let message = "nobody may send; name a principal, or leave the key out to let anybody";
            self.error(names.span(), message);
        }
        let known: Vec<&str> = principals.iter().map(|known| &*known.name).collect();
        let mut indexes = Vec::new();
        for name in names.into_inner() {
            match known.iter().position(|known| known == name.get_ref()) {
                Some(index) if indexes.contains(&index) => {
                    self.error(name.span(), "named twice; remove one");
                }
                Some(index) => indexes.push(index),
                None => {
                    let text = name.get_ref();
                    let message = match nearest(text, &known) {
                        Some(nearest) => {
                            format!("no principal `{text}`; did you mean `{nearest}`?")
                        }
                        None if known.is_empty() => {
                            format!("no principal `{text}`; add a [[principal]] of this name")
                        }
                        None => format!("no principal `{text}`; use {}", list(&known)),
                    };
                    self.error(name.span(), message);
                }
            }
        }
        Some(indexes)
    }

    /// Networks, such as `10.0.0.0/8`; an address is a network of its own.
    pub(super) fn networks(&mut self, key: Key<Vec<Spanned<String>>>) -> Vec<IpNet> {
        let Some(texts) = key else { return Vec::new() };
        let count = texts.get_ref().len();
        if count == 0 || count > NETWORK_COUNT_MAX {
            let message =
                format!("{count} networks; give 1 to {NETWORK_COUNT_MAX}, or leave the key out");
            self.error(texts.span(), message);
        }
        let mut networks = Vec::new();
        for text in texts.into_inner() {
            let parsed = match text.get_ref().parse::<IpAddr>() {
                Ok(address) => Some(IpNet::from(address)),
                Err(_) => text.get_ref().parse::<IpNet>().ok(),
            };
            match parsed {
                // Bits that mean nothing are a mistake of somebody.
                Some(network) if network == network.trunc() => networks.push(network),
                Some(network) => {
                    let message = format!(
                        "{network} has bits outside of its prefix; did you mean \"{}\"?",
                        network.trunc()
                    );
                    self.error(text.span(), message);
                }
                None => {
                    let message = format!(
                        "\"{}\" is not a network; write an address and a prefix, such as \"10.0.0.0/8\"",
                        text.get_ref()
                    );
                    self.error(text.span(), message);
                }
            }
        }
        networks
    }

    pub(super) fn rate(&mut self, key: Key<TableOf<RawRate>>) -> Option<Rate> {
        let key = key?;
        let span = key.span();
        let TableOf(raw) = key.into_inner();
        if raw.requests.is_none() && raw.bytes.is_none() {
            self.error(span, "a rate has `requests` or `bytes`; add one");
        }
        Some(Rate {
            requests: raw
                .requests
                .map(|requests| self.integer(Some(requests), 1, 1..=RATE_MAX as usize) as u64),
            bytes: raw.bytes.map(|bytes| self.size(&bytes, 1..=RATE_MAX)),
            burst: self.duration(raw.burst, Duration::from_secs(1)),
        })
    }
}

fn hash_parse(text: &str) -> Option<[u8; 32]> {
    let mut hash = [0; 32];
    let digits = text.as_bytes();
    if digits.len() != 2 * hash.len() || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    for (byte, pair) in hash.iter_mut().zip(digits.chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(hash)
}
