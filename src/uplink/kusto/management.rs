//! The data management endpoint: where to log in, and management commands.
//!
//! Before it: the configuration names an endpoint whose host is trusted.
//! After it: `identity.rs` logs in, `resources.rs` reads the tables.
//! Thread: the uplink's runtime. Allocates: per command, bounded by the answer's limit.
//! Invariant: a token leaves only for a trusted host, and is for an audience that is Kusto's.
//! Not here: what the tables of a command mean.
//!
//! Source: "Query/management HTTP request" and "response" in the Kusto documentation; the official clients for
//! `/v1/rest/auth/metadata`, which has no page.

use jiff::SignedDuration;
use reqwest::Url;
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderValue};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use super::http::{Answer, Http, one_line, send};
use super::token::Token;
use super::trusted::{Role, TrustedHosts};
use super::{CLIENT_VERSION, request_id};
use crate::error::{Remedy, UploadError, UploadStep};
use crate::limits::{AUTH_METADATA_TIMEOUT, MANAGEMENT_ANSWER_SIZE_MAX, MANAGEMENT_TIMEOUT};

/// The database of commands that are about none.
pub const NO_DATABASE: &str = "NetDefaultDB";

/// One endpoint, with what it says about itself.
pub struct Endpoint {
    uri: Url,
    http: Http,
    trusted: TrustedHosts,
    auth_metadata: OnceCell<AuthMetadata>,
}

/// Where to log in, and for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthMetadata {
    pub login: Url,
    /// The audience and `/.default`.
    pub scope: String,
    /// How far this machine's clock was ahead of the service's.
    pub clock_skew: Option<SignedDuration>,
}

/// Why a command has no table.
#[derive(Debug)]
pub struct CommandError {
    /// Of the answer, if there was one.
    pub status: Option<u16>,
    pub error: UploadError,
}

impl From<CommandError> for UploadError {
    fn from(failed: CommandError) -> Self {
        failed.error
    }
}

impl CommandError {
    /// What the command is about does not exist.
    pub fn is_not_found(&self) -> bool {
        self.status == Some(400) && self.error.code.contains("NotFound")
    }
}

/// The first table of an answer.
#[derive(Debug)]
pub struct Rows {
    columns: Vec<String>,
    rows: Vec<Vec<Value>>,
}

impl Endpoint {
    pub fn new(uri: Url, http: Http, trusted: TrustedHosts) -> Self {
        Endpoint {
            uri,
            http,
            trusted,
            auth_metadata: OnceCell::new(),
        }
    }

    pub fn http(&self) -> &Http {
        &self.http
    }

    pub fn trusted(&self) -> &TrustedHosts {
        &self.trusted
    }

    /// The query endpoint of the same cluster: the same name without `ingest-`.
    pub fn engine(&self) -> Endpoint {
        let mut uri = self.uri.clone();
        let host = uri.host_str().unwrap_or_default();
        if let Some(host) = host.strip_prefix("ingest-").map(str::to_owned) {
            // The rest of a name is a name.
            let _ = uri.set_host(Some(&host));
        }
        Endpoint::new(uri, self.http.clone(), self.trusted.clone())
    }

    /// Host and port: all that messages say of the endpoint.
    pub fn host(&self) -> &str {
        self.uri.authority()
    }

    /// Where to log in; asked once, as it does not change.
    pub async fn auth_metadata(&self) -> Result<&AuthMetadata, UploadError> {
        let metadata = self.auth_metadata.get_or_try_init(|| async {
            let answer = self.fetch_auth_metadata().await?;
            self.read_auth_metadata(&answer)
        });
        metadata.await
    }

    /// The answer to the question where to log in, to which no token is needed.
    async fn fetch_auth_metadata(&self) -> Result<Answer, UploadError> {
        let url = self.path("/v1/rest/auth/metadata");
        let request = self
            .http
            .client(&url)
            .get(url)
            .header(ACCEPT, "application/json")
            .header("x-ms-client-request-id", request_id());
        send(request, AUTH_METADATA_TIMEOUT, MANAGEMENT_ANSWER_SIZE_MAX)
            .await
            .map_err(|unanswered| unanswered.at(UploadStep::Endpoint, self.host()))
    }

    fn read_auth_metadata(&self, answer: &Answer) -> Result<AuthMetadata, UploadError> {
        let fault = |remedy, code: &str, detail: String| UploadError {
            remedy,
            step: UploadStep::Endpoint,
            code: code.into(),
            detail,
        };
        let retry = Remedy::Retry {
            after: answer.retry_after,
        };
        let document: AuthDocument = match answer.status {
            200 => serde_json::from_slice(&answer.body).map_err(|_| {
                let detail = format!(
                    "{} does not answer as a cluster does; check destination.ingest_uri",
                    self.host()
                );
                fault(retry, "auth_metadata_unreadable", detail)
            })?,
            // A service from before there was this question.
            404 => AuthDocument::public_cloud(),
            status => {
                let detail = format!("{} answers {status} to where to log in", self.host());
                return Err(fault(retry, &format!("http_{status}"), detail));
            }
        };
        let document = document.azure_ad;
        let untrusted = |url: &str, role| match Url::parse(url) {
            Ok(parsed) => {
                let checked = self.trusted.check(&parsed, role);
                checked
                    .map(|()| parsed)
                    .map_err(|why| fault(Remedy::Park, "host_untrusted", why.to_string()))
            }
            Err(_) => Err(fault(
                retry,
                "auth_metadata_unreadable",
                format!("{} names a login endpoint that is not a URL", self.host()),
            )),
        };
        let login = untrusted(&document.login_endpoint, Role::Login)?;
        let mut audience = document.resource_id;
        if document.login_mfa_required {
            audience = audience.replacen(".kusto.", ".kustomfa.", 1);
        }
        untrusted(&audience, Role::Audience)?;
        Ok(AuthMetadata {
            login,
            scope: format!("{}/.default", audience.trim_end_matches('/')),
            clock_skew: answer.clock_skew,
        })
    }

    /// Runs a management command; `step` names it in errors.
    pub async fn command(
        &self,
        token: &Token,
        database: &str,
        command: &str,
        step: UploadStep,
    ) -> Result<Rows, CommandError> {
        let failed = |status, error| CommandError { status, error };
        let fault = |step, code: &str, detail: String| UploadError {
            remedy: Remedy::Retry { after: None },
            step,
            code: code.into(),
            detail,
        };
        let url = self.path("/v1/rest/mgmt");
        let mut authorization = HeaderValue::try_from(format!("Bearer {}", token.expose()))
            .map_err(|_| {
                let detail = "the token has characters that no header can have".into();
                failed(None, fault(UploadStep::Token, "token_unusable", detail))
            })?;
        authorization.set_sensitive(true);
        let request_id = request_id();
        let request = self
            .http
            .client(&url)
            .post(url)
            .header(ACCEPT, "application/json")
            .header(AUTHORIZATION, authorization)
            .header("Content-Type", "application/json; charset=utf-8")
            .header("x-ms-version", "2024-12-12")
            .header("x-ms-client-request-id", &request_id)
            .header("x-ms-app", "weir")
            .header("x-ms-client-version", CLIENT_VERSION)
            .body(json!({"db": database, "csl": command}).to_string());
        let answer = send(request, MANAGEMENT_TIMEOUT, MANAGEMENT_ANSWER_SIZE_MAX)
            .await
            .map_err(|unanswered| failed(None, unanswered.at(step, self.host())))?;
        tracing::debug!(
            %step, status = answer.status, %request_id,
            activity_id = answer.activity_id.as_deref(), "a management command was answered"
        );
        let result = match answer.status {
            200 => Rows::read(&answer).map_err(|detail| fault(step, "answer_unreadable", detail)),
            _ => Err(refused(&answer, step, self.host())),
        };
        result.map_err(|error| failed(Some(answer.status), error))
    }

    fn path(&self, path: &str) -> Url {
        let mut url = self.uri.clone();
        url.set_path(path);
        url
    }
}

/// What a refused command means. Source: "Query/management HTTP response", and `OneApiErrors` for the body.
fn refused(answer: &Answer, step: UploadStep, host: &str) -> UploadError {
    let body: Option<OneApiError> = serde_json::from_slice(&answer.body).ok();
    let error = body.map(|body| body.error).unwrap_or_default();
    let kind = error.kind.rsplit('.').next().unwrap_or_default();
    let said = match error.detail.is_empty() {
        true => answer.excerpt(),
        false => one_line(&error.detail),
    };
    let retry = Remedy::Retry {
        after: answer.retry_after,
    };
    let (remedy, detail) = match answer.status {
        401 => (
            Remedy::Refresh,
            format!(
                "{host} refuses the token; check that the identity's tenant is the cluster's, and \
                 this machine's clock: {said}"
            ),
        ),
        403 => (
            Remedy::Park,
            format!(
                "{host} knows the identity but does not let it ingest; run in the database: .add \
                 database <name> ingestors ('aadapp=<client id>;<tenant id>'): {said}"
            ),
        ),
        // The engine's own words end in the name of the right endpoint.
        400 if kind == "AdminCommandWrongEndpointException" => (
            Remedy::Park,
            format!(
                "{host} is a query endpoint; change destination.ingest_uri to https://ingest-{host}"
            ),
        ),
        400 if error.permanent => (Remedy::Park, said),
        status @ 300..400 => (
            Remedy::Park,
            format!(
                "{host} redirects with {status}, which weir does not follow; check destination.ingest_uri"
            ),
        ),
        404 => (
            Remedy::Park,
            format!("{host} has no management endpoint; check destination.ingest_uri"),
        ),
        status => (retry, format!("{host} answers {status}: {said}")),
    };
    UploadError {
        remedy,
        step,
        code: match (kind, error.code.as_str()) {
            ("", "") => format!("http_{}", answer.status),
            ("", code) => one_line(code),
            (kind, _) => one_line(kind),
        },
        detail,
    }
}

impl Rows {
    fn read(answer: &Answer) -> Result<Self, String> {
        let dataset: Dataset = serde_json::from_slice(&answer.body).map_err(|_| {
            format!(
                "the answer is not a table: it has {} bytes, and this or more is read: {}",
                answer.body.len(),
                MANAGEMENT_ANSWER_SIZE_MAX
            )
        })?;
        // "Processing started" is all that 200 says; what went wrong later is in the body.
        if !dataset.exceptions.is_empty() {
            let said: Vec<String> = dataset.exceptions.iter().map(Value::to_string).collect();
            return Err(one_line(&said.join("; ")));
        }
        let table = dataset.tables.into_iter().next();
        let table = table.ok_or("the answer has no table")?;
        let columns = table.columns.into_iter().map(|column| column.name);
        Ok(Rows {
            columns: columns.collect(),
            rows: table.rows,
        })
    }

    #[cfg(test)]
    pub fn of(columns: &[&str], rows: &[&[&str]]) -> Self {
        let row = |row: &&[&str]| row.iter().map(|text| Value::from(*text)).collect();
        Rows {
            columns: columns.iter().map(|name| (*name).into()).collect(),
            rows: rows.iter().map(row).collect(),
        }
    }

    /// The texts of these columns, row by row; a row without one of them is left out.
    pub fn texts<const N: usize>(
        &self,
        names: [&str; N],
    ) -> Result<impl Iterator<Item = [&str; N]>, String> {
        let mut indexes = [0; N];
        for (index, name) in indexes.iter_mut().zip(names) {
            let found = self.columns.iter().position(|column| column == name);
            *index = found.ok_or_else(|| format!("the answer has no column {name}"))?;
        }
        Ok(self.rows.iter().filter_map(move |row| {
            let texts = indexes.map(|index| row.get(index).and_then(Value::as_str));
            texts
                .iter()
                .all(Option::is_some)
                .then(|| texts.map(Option::unwrap_or_default))
        }))
    }
}

#[derive(Deserialize)]
struct AuthDocument {
    #[serde(rename = "AzureAD")]
    azure_ad: AzureAd,
}

#[derive(Deserialize)]
struct AzureAd {
    #[serde(rename = "LoginEndpoint")]
    login_endpoint: String,
    #[serde(rename = "LoginMfaRequired", default)]
    login_mfa_required: bool,
    #[serde(rename = "KustoServiceResourceId")]
    resource_id: String,
}

impl AuthDocument {
    fn public_cloud() -> Self {
        AuthDocument {
            azure_ad: AzureAd {
                login_endpoint: "https://login.microsoftonline.com".into(),
                login_mfa_required: false,
                resource_id: "https://kusto.kusto.windows.net".into(),
            },
        }
    }
}

#[derive(Deserialize)]
struct OneApiError {
    error: OneApiErrorBody,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct OneApiErrorBody {
    code: String,
    #[serde(rename = "@type")]
    kind: String,
    #[serde(rename = "@message")]
    detail: String,
    #[serde(rename = "@permanent")]
    permanent: bool,
}

#[derive(Deserialize)]
struct Dataset {
    #[serde(rename = "Tables", default)]
    tables: Vec<DatasetTable>,
    #[serde(rename = "Exceptions", default)]
    exceptions: Vec<Value>,
}

#[derive(Deserialize)]
struct DatasetTable {
    #[serde(rename = "Columns")]
    columns: Vec<DatasetColumn>,
    #[serde(rename = "Rows")]
    rows: Vec<Vec<Value>>,
}

#[derive(Deserialize)]
struct DatasetColumn {
    #[serde(rename = "ColumnName")]
    name: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, body: &str) -> Answer {
        Answer {
            status,
            error_code: None,
            retry_after: None,
            clock_skew: None,
            activity_id: None,
            body: body.into(),
        }
    }

    fn endpoint() -> Endpoint {
        let uri: Url = "https://ingest-c.westeurope.kusto.windows.net"
            .parse()
            .unwrap();
        let trusted = TrustedHosts::of(&uri, &[]).unwrap();
        Endpoint::new(uri, Http::new().unwrap(), trusted)
    }

    fn document(login: &str, mfa: bool, resource: &str) -> Answer {
        let body = json!({"AzureAD": {
            "LoginEndpoint": login, "LoginMfaRequired": mfa, "KustoServiceResourceId": resource,
            "KustoClientAppId": "ignored",
        }});
        answer(200, &body.to_string())
    }

    const LOGIN: &str = "https://login.microsoftonline.com";
    const RESOURCE: &str = "https://kusto.kusto.windows.net";

    #[test]
    fn the_audience_comes_from_the_endpoint() {
        let scope = |answer: &Answer| endpoint().read_auth_metadata(answer).unwrap().scope;
        assert_eq!(
            scope(&document(LOGIN, false, RESOURCE)),
            "https://kusto.kusto.windows.net/.default"
        );
        assert_eq!(
            scope(&document(LOGIN, true, RESOURCE)),
            "https://kusto.kustomfa.windows.net/.default"
        );
        assert_eq!(
            scope(&answer(404, "")),
            scope(&document(LOGIN, false, RESOURCE))
        );
    }

    #[test]
    fn no_secret_goes_where_a_hostile_endpoint_points() {
        for (login, resource) in [
            ("https://evil.example", RESOURCE),
            (LOGIN, "https://management.azure.com"),
            ("http://127.0.0.1:1", RESOURCE),
        ] {
            let error = endpoint().read_auth_metadata(&document(login, false, resource));
            let error = error.unwrap_err();
            assert_eq!(
                (error.remedy, &*error.code),
                (Remedy::Park, "host_untrusted")
            );
        }
        for (status, body) in [
            (200, "{}"),
            (200, ""),
            (200, "<html>"),
            (500, ""),
            (302, ""),
        ] {
            let error = endpoint()
                .read_auth_metadata(&answer(status, body))
                .unwrap_err();
            assert_eq!(
                error.remedy,
                Remedy::Retry { after: None },
                "{status} {body}"
            );
        }
    }

    #[test]
    fn refusals_say_who_must_act() {
        let one_api = |kind: &str, permanent: bool| {
            json!({"error": {"code": "BadRequest", "message": "m", "@type": kind,
                "@message": "what happened", "@permanent": permanent}})
            .to_string()
        };
        let retry = Remedy::Retry { after: None };
        let wrong = one_api(
            "Kusto.Common.Svc.Exceptions.AdminCommandWrongEndpointException",
            false,
        );
        for (status, body, remedy, part) in [
            (401, "", Remedy::Refresh, "clock"),
            (403, "Forbidden", Remedy::Park, "ingestors"),
            (400, &*wrong, Remedy::Park, "https://ingest-h"),
            (400, &*one_api("A.B", true), Remedy::Park, "what happened"),
            (400, &*one_api("A.B", false), retry, "what happened"),
            (404, "", Remedy::Park, "ingest_uri"),
            (302, "", Remedy::Park, "does not follow"),
            (429, &*one_api("A.ThrottledException", false), retry, "429"),
            (500, "plain text", retry, "plain text"),
            (520, "", retry, "520"),
        ] {
            let error = refused(&answer(status, body), UploadStep::Resources, "h");
            assert_eq!(error.remedy, remedy, "{status} {body}");
            assert!(error.detail.contains(part), "{error}");
        }
        let error = refused(
            &answer(429, &one_api("A.Throttled", false)),
            UploadStep::Resources,
            "h",
        );
        assert_eq!(error.code, "Throttled");
    }

    #[test]
    fn columns_are_found_by_name_and_odd_rows_are_left_out() {
        let body = json!({"Tables": [{"TableName": "Table_0",
            "Columns": [{"ColumnName": "New", "DataType": "Int64"}, {"ColumnName": "B"}, {"ColumnName": "A"}],
            "Rows": [[1, "b1", "a1"], [2, null, "a2"], [3], [4, "b4", "a4", "more"]]}]});
        let rows = Rows::read(&answer(200, &body.to_string())).unwrap();
        let texts: Vec<[&str; 2]> = rows.texts(["A", "B"]).unwrap().collect();
        assert_eq!(texts, [["a1", "b1"], ["a4", "b4"]]);
        assert!(rows.texts(["C"]).err().unwrap().contains('C'));
        let failed = json!({"Tables": [], "Exceptions": ["out of memory"]});
        let error = Rows::read(&answer(200, &failed.to_string())).unwrap_err();
        assert!(error.contains("out of memory"), "{error}");
        assert!(Rows::read(&answer(200, "[]")).is_err());
    }
}
